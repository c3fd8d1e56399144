"""What `sample` draws: pictures of eighteen kinds."""
