"""The theme of the page: colours of paper and clay, the system's fonts, light and dark."""

from __future__ import annotations

from typing import Any

CSS = """
.gradio-container { width: 100% !important; max-width: 1240px !important; margin: 0 auto !important;
  padding: 12px clamp(8px, 2vw, 20px) 40px !important; }
.gradio-container > .main { padding: 8px 0 !important; }
.html-container { padding: 0 !important; }
#head { padding: 6px 2px 0; }
#head h1 { font-size: 1.5rem; font-weight: 650; letter-spacing: -0.01em; margin: 0; }
#head p, #head .by { margin: 2px 0 0; color: var(--body-text-color-subdued); }
.strengths input[type=number] { min-width: 0 !important; width: 60px !important; }
.welcome { border: 1px dashed var(--border-color-primary); border-radius: 8px; padding: 28px 32px; }
.welcome h3 { margin: 0 0 10px; }
.welcome ol { margin: 0; padding-left: 1.3em; display: grid; gap: 6px; list-style: decimal; }
.stage { display: flex; flex-direction: column; gap: 8px; color: var(--body-text-color-subdued); font-size: .9rem; }
.stage img { width: 100%; max-height: 560px; object-fit: contain; border-radius: 8px; }
.stage .empty { aspect-ratio: 3 / 4; max-height: 560px; border: 1px dashed var(--border-color-primary);
  border-radius: 8px; display: grid; place-items: center; }
.stage .empty::before { content: "The picture appears here."; color: var(--body-text-color-subdued); }
.stage .bar { height: 4px; border-radius: 2px; background: var(--border-color-primary); overflow: hidden; }
.stage .bar i { display: block; height: 100%; background: var(--color-accent); transition: width .2s; }
.stage .words { font-variant-numeric: tabular-nums; min-height: 1.3em; }
#gallery .grid-container { grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)) !important; }
#gallery { min-height: 0 !important; }
#gallery .grid-wrap { height: auto !important; min-height: 0 !important; padding-top: 26px; }
#save-body, #back { align-self: flex-end; flex-grow: 1; }
input[type=range]::-webkit-slider-thumb { border: 2px solid var(--color-accent) !important; }
input[type=range]::-moz-range-thumb { border: 2px solid var(--color-accent) !important; }
.dark input[type=range] { --neutral-200: var(--neutral-700); }
.measures label span { font-size: .85rem !important; }
.settings dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 16px; margin: 0; font-size: .9rem; }
.settings dt { color: var(--body-text-color-subdued); }
.settings dd { margin: 0; overflow-wrap: anywhere; }
.quiet { color: var(--body-text-color-subdued); font-size: .9rem; }
.report iframe { width: 100%; height: 76vh; border: 1px solid var(--border-color-primary); border-radius: 8px;
  background: white; }
.detections { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 10px; }
.detections figure { margin: 0; }
.detections img { width: 100%; aspect-ratio: 3 / 4; object-fit: cover; object-position: top; border-radius: 6px; }
.detections figcaption { font-size: .78rem; line-height: 1.3; color: var(--body-text-color-subdued); }
.measures { gap: 8px !important; }
.measures .block { padding: 6px 10px 4px !important; }
button.lg, button.sm, label.lg, label.sm { font-weight: 500 !important; }
button.lg, label.lg { font-size: .95rem !important; padding: 8px 14px !important; }
footer { display: none !important; }
@media (max-width: 640px) {
  .column:has(> .welcome-block) { order: -1; }
}
"""

NO_REQUESTS = "<meta name='referrer' content='no-referrer'>"
"""For the page's head."""


def theme() -> Any:
    """Gradio's plain theme in paper, ink and clay."""
    import gradio as gr
    from gradio.themes.utils.colors import Color

    clay = Color("#fdf5f2", "#f9e5de", "#f2c9bb", "#e8a591", "#da7a5f", "#c43c2c", "#a93325", "#8b2a1f", "#6e221a",
                 "#521b15", "#38120e", name="clay")  # fmt: skip
    stone = Color("#faf9f7", "#f3f1ed", "#e7e3dd", "#d3cec6", "#a8a199", "#7b746d", "#59534e", "#423d39", "#2b2826",
                  "#1f1d1b", "#151413", name="stone")  # fmt: skip
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
    base = gr.themes.Base(primary_hue=clay, secondary_hue=stone, neutral_hue=stone, font=fonts, font_mono=mono,
                          radius_size="md", spacing_size="md", text_size="md")  # fmt: skip
    return base.set(
        body_background_fill="*neutral_50", body_background_fill_dark="*neutral_950",
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_400",
        block_background_fill="white", block_background_fill_dark="*neutral_900",
        block_border_width="1px", block_shadow="none",
        block_label_background_fill="transparent", block_label_border_width="0px",
        block_label_text_color="*neutral_500", block_label_text_color_dark="*neutral_400",
        input_background_fill="*neutral_50", input_background_fill_dark="*neutral_950",
        button_primary_background_fill="*primary_500", button_primary_background_fill_dark="*primary_500",
        button_primary_background_fill_hover="*primary_600", button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white", button_primary_text_color_dark="white",
        button_secondary_background_fill="white", button_secondary_background_fill_dark="*neutral_800",
        button_secondary_border_color="*neutral_300", button_secondary_border_color_dark="*neutral_700",
        button_border_width="1px", button_border_width_dark="1px",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_background_fill_hover_dark="*neutral_700",
        slider_color="*primary_500", slider_color_dark="*primary_400",
    )  # fmt: skip
