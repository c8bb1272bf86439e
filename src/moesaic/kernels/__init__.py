"""Operations that are worth a fast version: in each folder the plain truth (``reference.py``) beside the fast ones."""
