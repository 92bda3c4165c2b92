"""One file a command: options, one-line errors, what is printed. What a command does is in the rooms below, for Python too."""
