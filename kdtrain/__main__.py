"""The command `kdtrain`; `python -m kdtrain` and `accelerate launch -m kdtrain`."""

from kdtrain.runs.signals import end_silently_at_interrupts

end_silently_at_interrupts()  # before the rest is imported, which takes a while

from kdtrain.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
