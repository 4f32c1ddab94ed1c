"""What ``dinov3-mm COMMAND`` and ``tools/*.py`` do: command lines of everything else.

A module is imported when one of its commands is given; ``dinov3_mm_cli`` lists them.
"""
