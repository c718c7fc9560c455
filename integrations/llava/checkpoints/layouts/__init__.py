"""One file a layout: how its checkpoints are read into `content`, and written from there."""
