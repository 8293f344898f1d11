"""The exercises of unit 01, one file each."""
