"""What a training run needs besides the files at the root."""
