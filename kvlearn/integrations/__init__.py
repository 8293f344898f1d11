"""kvlearn's attention inside other libraries. Each module needs its library, and asks for it by its extra."""
