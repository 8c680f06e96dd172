"""What simpo_dna.py needs beside it: rewards, data, and the reader of DRAKES' checkpoints."""
