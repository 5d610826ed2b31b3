"""What a merge did, for people.

``table`` and ``summary`` make tables and lines, ``units`` puts bytes and seconds into words,
``card`` writes the model card of an output folder.
"""
