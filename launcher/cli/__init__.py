"""The command; each verb only reads its words and calls one door.

In: words.
Out: what it printed, and an exit code: 0 done, 1 failed, 2 bad input, 75 stopped before its end.
May import: bench, foreground, frozen, submission, watch, data_prep.conversion, data_prep.convert,
    data_prep.slurm, data_prep.verify, resnet_dist.config.
"""
