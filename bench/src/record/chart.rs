//! Charts of a report: one for the main metric of its cases, bars with their spread, by case and proxy.

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::report::{Report, Row};

const PALETTE: [RGBColor; 8] = [
    RGBColor(31, 119, 180),
    RGBColor(255, 127, 14),
    RGBColor(44, 160, 44),
    RGBColor(214, 39, 40),
    RGBColor(148, 103, 189),
    RGBColor(140, 86, 75),
    RGBColor(127, 127, 127),
    RGBColor(23, 190, 207),
];
const BAR_PX: u32 = 22;
const HEIGHT_PX: u32 = 360;

/// Name of the metric and text of the SVG, for each metric that is the first of some case.
pub fn draw(report: &Report) -> Result<Vec<(String, String)>> {
    let mut charts: Vec<(String, String)> = Vec::new();
    let mut cases: Vec<&str> = Vec::new();
    for row in &report.rows {
        let is_first = !cases.contains(&row.case.as_str());
        cases.push(&row.case);
        if is_first && charts.iter().all(|(metric, _)| *metric != row.metric) {
            let svg =
                chart(report, &row.metric).map_err(|error| anyhow!("draw a chart: {error}"))?;
            charts.push((row.metric.clone(), svg));
        }
    }
    Ok(charts)
}

fn chart(report: &Report, metric: &str) -> Result<String, Box<dyn std::error::Error>> {
    let rows: Vec<&Row> = report
        .rows
        .iter()
        .filter(|row| row.metric == metric && row.median.is_some())
        .collect();
    let (cases, proxies) = (
        distinct(&rows, |row| &row.case),
        distinct(&rows, |row| &row.proxy),
    );
    let highest = rows
        .iter()
        .filter_map(|row| row.max)
        .fold(0.0, f64::max)
        .max(1e-9);
    let unit = rows.first().map_or("", |row| row.unit.as_str());
    // Each case has a bar for each proxy and a gap of one.
    let slots = cases.len() * (proxies.len() + 1) + 1;
    let width = (u32::try_from(slots)? * BAR_PX + 260).max(640);
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (width, HEIGHT_PX)).into_drawing_area();
        area.fill(&WHITE)?;
        let mut context = ChartBuilder::on(&area)
            .caption(
                format!("{}: {metric} ({unit})", report.scenario),
                ("sans-serif", 16),
            )
            .margin(8)
            .margin_right(170)
            .y_label_area_size(70)
            .x_label_area_size(30)
            .build_cartesian_2d(0.0..slots as f64, 0.0..highest * 1.08)?;
        context
            .configure_mesh()
            .disable_x_mesh()
            .disable_x_axis()
            .draw()?;
        for (at, case) in cases.iter().enumerate() {
            let left = (at * (proxies.len() + 1) + 1) as f64;
            for (number, proxy) in proxies.iter().enumerate() {
                let Some(row) = rows
                    .iter()
                    .find(|row| row.case == *case && row.proxy == *proxy)
                else {
                    continue;
                };
                let bar = left + number as f64;
                let (low, middle, high) = (
                    row.min.unwrap_or(0.0),
                    row.median.unwrap_or(0.0),
                    row.max.unwrap_or(0.0),
                );
                let colour = PALETTE[number % PALETTE.len()];
                context.draw_series([
                    Rectangle::new([(bar + 0.1, 0.0), (bar + 0.9, middle)], colour.filled()),
                    Rectangle::new([(bar + 0.48, low), (bar + 0.52, high)], BLACK.filled()),
                ])?;
            }
            let below = context.backend_coord(&(left, 0.0));
            area.draw(&Text::new(
                (*case).to_owned(),
                (below.0, below.1 + 8),
                ("sans-serif", 12),
            ))?;
        }
        for (number, proxy) in proxies.iter().enumerate() {
            let (left, top) = (width as i32 - 160, 40 + 20 * number as i32);
            let colour = PALETTE[number % PALETTE.len()];
            area.draw(&Rectangle::new(
                [(left, top), (left + 12, top + 12)],
                colour.filled(),
            ))?;
            area.draw(&Text::new(
                (*proxy).to_owned(),
                (left + 18, top),
                ("sans-serif", 13),
            ))?;
        }
        area.present()?;
    }
    if !svg.ends_with('\n') {
        svg.push('\n');
    }
    Ok(svg)
}

/// In the order of their first appearance.
fn distinct<'a>(rows: &[&'a Row], of: impl Fn(&'a Row) -> &'a String) -> Vec<&'a str> {
    let mut found: Vec<&str> = Vec::new();
    for row in rows {
        let name = of(row).as_str();
        if !found.contains(&name) {
            found.push(name);
        }
    }
    found
}
