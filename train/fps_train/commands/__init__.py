"""Command lines of training, one file a command; nothing is exported. What they do lies in the files of fps_train."""
