"""Choosing and cleaning captions with Data-Juicer operators on Ray Data; quality metrics and the reason of every
reject.
"""
