"""The files of a training run: written so that it resumes, read by whoever uses what it trained."""
