"""What all dialects share: keys, scales, rows that move between modules, reading and writing."""
