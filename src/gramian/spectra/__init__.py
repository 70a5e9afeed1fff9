"""Spectra: what the singular values of a network's matrices say about it, without any data."""

from gramian.spectra.eigenvalues import Spectrum, spectrum
from gramian.spectra.layers import LayerReport, inspect_layer, inspect_layers, neighbour_cosine, structure_errors
from gramian.spectra.sources import Source, open_source
from gramian.spectra.tail import PowerLaw, farms, fit_power_law, hill

__all__ = [
    "LayerReport",
    "PowerLaw",
    "Source",
    "Spectrum",
    "farms",
    "fit_power_law",
    "hill",
    "inspect_layer",
    "inspect_layers",
    "neighbour_cosine",
    "open_source",
    "spectrum",
    "structure_errors",
]
