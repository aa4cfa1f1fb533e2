"""Web pages to try SigLIP in: search by drawing, models side by side, labels in many languages. Extra: `apps`.

A page is a module with `build(...)`, which returns it as `gradio.Blocks`; `page.serve` puts it on a port.
"""
