"""Model repositories in object stores: listed there, and brought into a cache of this machine to be loaded."""
