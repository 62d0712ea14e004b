// Texts of the page whose contrast with their ground is below what WCAG AA wants, and how many texts were looked at.
() => {
  const channels = (text) => {
    const parts = text.match(/[\d.]+/g).map(Number);
    return { rgb: parts.slice(0, 3), alpha: parts[3] ?? 1 };
  };
  const linear = (one) => (one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((one) => linear(one / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const found = channels(getComputedStyle(one).backgroundColor);
      if (found.alpha === 1) return found.rgb;
    }
    return null;
  };
  const poor = [];
  let seen = 0;
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode.data.trim();
    const element = texts.currentNode.parentElement;
    if (!text || !element.checkVisibility() || element.closest("script, style, :disabled, .unseen, .skip")) continue;
    const style = getComputedStyle(element);
    const colour = channels(element.closest("svg.chart") ? style.fill : style.color).rgb;
    const [one, other] = [luminance(colour), luminance(ground(element))];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    seen += 1;
    if (ratio < 4.5) poor.push(`${element.outerHTML.slice(0, 60)}: ${text.slice(0, 40)}: ${ratio.toFixed(2)}`);
  }
  return { seen, poor };
}
