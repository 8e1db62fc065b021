"""Constants of csrc/cuda/cuda.h that build.py can set and tune.py tries, at 2048 x 8192 int16 scores on sm_90a.

As they are, a thread owns 16 columns of a row and has up to 128 registers; one block of 512 threads fills a
multiprocessor, and waits as a whole for each sum of a row.
"""

TRIED = {
    # Twice the warps to choose from, of 64 registers: each does twice the shuffles for a score, and `match` spills.
    "threads1024": "BAM_OCTETS=1 BAM_THREADS=1024 BAM_REGISTER_THREADS=1024",
    # Half the warps, of up to 255 registers: half the shuffles for a score, and more that does not depend on another.
    "octets4": "BAM_OCTETS=4 BAM_THREADS=256 BAM_REGISTER_THREADS=256",
    # A row over a cluster of two blocks of 256 threads, two on a multiprocessor: one computes while the other waits.
    "threads256": "BAM_THREADS=256",
    # More rows on their way, in groups of two: whether a read's latency is what the pass and the match wait for.
    "deeper": "BAM_GROUPS=3 BAM_STAGES=6",
}
