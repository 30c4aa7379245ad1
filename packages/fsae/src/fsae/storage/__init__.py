"""Files that are whole or not there, and checkpoints that are read strictly. Shared by all packages."""
