"""Errors, exit codes, atomic writes and parsing of untrusted files. Standard library, PyYAML and tokenizers only."""
