"""What a layer remembers: blocks, the search over their landmarks, and where they are thought to
stand.
"""
