"""`python -m trimaran.launchers.worker`: one rank under torchrun, srun or mpirun."""

from trimaran.launchers.worker.entry import main

main()
