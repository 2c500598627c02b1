"""Tables, figures and the page, each number read from a metrics file or from published.yaml."""
