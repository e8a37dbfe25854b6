"""`python -m kdtrain` and `accelerate launch -m kdtrain`."""

from kdtrain.cli import main

if __name__ == "__main__":
    main()
