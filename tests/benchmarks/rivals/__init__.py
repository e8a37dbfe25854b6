"""The same distillation job by kdtrain and by other tools, each in an environment of its own."""
