// Draws every chart into its place; the page says when it is done, and whether one could not be drawn.
(async () => {
  const { config, specs } = JSON.parse(document.getElementById("charts").textContent);
  const places = [...document.querySelectorAll("[data-chart]")];
  const options = { actions: false, renderer: "svg", config, tooltip: { theme: "custom" } };
  const results = await Promise.allSettled(
    places.map((place) => vegaEmbed(place, specs[Number(place.dataset.chart)], options)),
  );
  results.forEach((result, index) => {
    if (result.status === "rejected") {
      places[index].textContent = "This chart could not be drawn.";
      console.error(result.reason);
    }
  });
  document.documentElement.dataset.charts = results.every((one) => one.status === "fulfilled") ? "drawn" : "failed";
})();
