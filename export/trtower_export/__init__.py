"""The build machine's side of trtower: checkpoint in, bundle out. Start reading at pipeline.py."""
