"""Ready-made attachments to other libraries' trainers; each module imports its library, none is imported unasked."""
