def tracker(kind, name, flags):
    return None
