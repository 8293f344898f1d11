"""What ``kvlearn bench decode`` and ``kvlearn bench decode_tune`` are made of.

``cells`` says what is measured, ``inputs`` makes the tensors, ``exact`` is the truth in fp64, ``rivals`` are
those it is measured against, ``clocks`` measure, ``contest`` puts them together; ``grid``, ``special`` and
``others`` hold the bars, ``jobs`` keeps the whole within its time.
"""
