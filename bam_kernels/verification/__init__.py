"""Which GPU kernels `backend="auto"` may use: those verified by this project, or on this very machine.

trust        the decision for a device of this process
identity     what a verdict is about: GPU, driver, versions, sources
verified     verdicts of this project
store        verdicts of this machine, kept between processes
trial        processes that try the kernels, and what their end means
problems     the program of such a process: compares kernels with float64
cases        what it computes: problems of fixed seed that force every form of the kernels

`python -m bam_kernels.verify` tries the kernels by hand.
"""
