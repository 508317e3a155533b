"""`python -m glm4run`."""

from glm4run.cli import main

main()
