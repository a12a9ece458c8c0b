"""Jobs for SLURM: the scripts of slurm/ with a cluster's facts and a job's arguments in them."""
