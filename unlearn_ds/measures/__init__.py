"""From a pass over a set to numbers: tables of sequences, attacks, intervals, the verdict, and the files that hold them."""
