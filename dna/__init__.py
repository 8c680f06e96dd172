"""What simpo_dna.py needs beside it: rewards, data, metrics and files."""
