"""MotionBench: models measured on synthetic clips, every claim checked by a program.

`follow` finds the shapes of a clip and their motions, `checks` gives verdicts, and `validation`
measures the checker itself.
"""
