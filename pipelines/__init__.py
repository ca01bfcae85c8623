"""captune's stages as a library: every stage reads a directory, writes a directory, and knows nothing of the stages
after it.
"""

__version__ = "0.1.0"
