"""`python -m trimaran.launchers.worker`: one rank under torchrun, srun or mpirun."""

from trimaran.runtime.processes import exit_with_parent

exit_with_parent()  # before the other imports: a launcher that dies meanwhile is noticed

from trimaran.launchers.worker.entry import main

main()
