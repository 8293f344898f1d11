"""The parts of ``kvlearn bench window``: exponents, layers, steps of decode, bytes, and choice by content."""
