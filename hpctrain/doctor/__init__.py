"""`hpctrain doctor`: facts of every rank, checks over all of them, one report.

`collect` gathers one rank's facts (local); every check is a small function from the facts of all
ranks to findings; `run` brings them together. To add a check, write the function and name it in
`checks.CHECKS`.
"""
