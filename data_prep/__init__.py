"""Command lines that turn text into the token files that training reads."""
