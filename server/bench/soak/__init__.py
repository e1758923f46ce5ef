"""`trm-bench soak`: does a server last?"""
