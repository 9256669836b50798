"""Turn many pictures into files of features. Start at embed.py."""
