"""A cluster on one machine: nodes with links of a set rate, MPI and SLURM over them."""
