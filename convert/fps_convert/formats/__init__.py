"""File formats, tensor by tensor and without torch: safetensors, `.pth`, and our own arrays. Knows no model and no layout."""
