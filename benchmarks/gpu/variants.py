"""Values of constants in csrc/cuda/cuda.h that build.py can set and tune.py tries.

Comments hold for 2048 x 8192 int16 scores on sm_90a. By default a thread owns 16 columns of a row and has up to 128
registers. One block of 512 threads fills a multiprocessor, and the whole block waits for each sum of a row.
"""

TRIED = {
    # Half the warps, of up to 255 registers: half the shuffles per score and more independent instructions.
    "octets4": "BAM_OCTETS=4 BAM_THREADS=256 BAM_REGISTER_THREADS=256",
    # Two blocks of 256 threads on a multiprocessor, two per row in a cluster: one computes while the other waits.
    "threads256": "BAM_THREADS=256",
    # More rows in flight, in groups of two: shows whether the pass and the match wait for the latency of reads.
    "deeper": "BAM_GROUPS=3 BAM_STAGES=8",
    # Fewer rows in flight for the match, as in clusters.
    "shallow": "BAM_STAGES=4",
}
