"""Everything a guest request needs: the kernel's face, the block graph, image formats, exports. Knows nothing
of jobs.
"""
