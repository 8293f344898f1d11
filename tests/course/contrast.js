// The lowest contrast (WCAG 2) of any text under `node` with the ground it stands on, and that text.
(node) => {
  const rgba = (text) => {
    const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const over = (top, under) => under.map((c, i) => top[i] * top[3] + c * (1 - top[3]));
  const ground = (element) =>
    element === null
      ? [255, 255, 255]
      : over(rgba(getComputedStyle(element).backgroundColor), ground(element.parentElement));
  const linear = (c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const luminance = (color) =>
    color.reduce((sum, c, i) => sum + linear(c / 255) * [0.2126, 0.7152, 0.0722][i], 0);
  const texts = document.createTreeWalker(node, NodeFilter.SHOW_TEXT);
  let worst = [21, ""];
  while (texts.nextNode()) {
    const text = texts.currentNode.data.trim();
    const element = texts.currentNode.parentElement;
    if (!text || element.closest("style, script") || !element.getClientRects().length) continue;
    const under = ground(element);
    const ink = over(rgba(getComputedStyle(element).color), under);
    const [low, high] = [luminance(ink), luminance(under)].sort((a, b) => a - b);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < worst[0]) worst = [contrast, text];
  }
  return worst;
}
