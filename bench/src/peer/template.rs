//! Fills a configuration template: `@NAME@` within a line, and lines `#if WORD` or `#each route` until `#end`.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::{Layer, Site, connections_max};

/// What a template is filled with.
pub struct Values<'a> {
    pub folder: &'a Path,
    pub site: Site,
    pub is_slowed: bool,
    pub descriptors: u64,
}

impl Values<'_> {
    /// A whole file.
    pub fn fill(&self, template: &str) -> Result<String> {
        let mut text = String::new();
        let mut block: Option<Vec<&str>> = None;
        let mut times = 0;
        for line in template.lines() {
            match (line.trim(), &mut block) {
                ("#end", Some(lines)) => {
                    for number in 0..times {
                        for line in lines.iter() {
                            let line = line.replace("@N@", &number.to_string());
                            text.push_str(&self.fill_line(&line));
                            text.push('\n');
                        }
                    }
                    block = None;
                }
                (directive, None)
                    if directive.starts_with("#if ") || directive.starts_with("#each ") =>
                {
                    times = self.times(directive)?;
                    block = Some(Vec::new());
                }
                (directive, _) if directive.starts_with("#if ") || directive == "#end" => {
                    bail!("`{directive}` in the wrong place")
                }
                (_, Some(lines)) => lines.push(line),
                (_, None) => {
                    // What explains the template is not for the file that is made from it.
                    if !(line.starts_with("# ") && line.contains('`') || line.contains("@...@")) {
                        text.push_str(&self.fill_line(line));
                        text.push('\n');
                    }
                }
            }
        }
        ensure!(block.is_none(), "a block has no `#end`");
        Ok(text)
    }

    /// One line without blocks.
    pub fn fill_line(&self, line: &str) -> String {
        let (listen, origin) = (self.site.listen(), self.site.origin());
        let certificate = match self.site.tls {
            true => format!("{}/certs/edge.pem", self.folder.display()),
            false => String::new(),
        };
        line.replace("@FOLDER@", &self.folder.display().to_string())
            .replace("@LISTEN@", &listen.to_string())
            .replace("@LISTEN_HOST@", &listen.ip().to_string())
            .replace("@LISTEN_PORT@", &listen.port().to_string())
            .replace("@ORIGIN@", &origin.to_string())
            .replace("@ORIGIN_HOST@", &origin.ip().to_string())
            .replace("@ORIGIN_PORT@", &origin.port().to_string())
            .replace("@ROUTES@", &self.site.routes.to_string())
            .replace("@CERTIFICATE@", &certificate)
            .replace("@DESCRIPTORS@", &self.descriptors.to_string())
            .replace("@CONNECTIONS@", &self.connections().to_string())
    }

    /// Splicing takes a pipe, and with it two descriptors more, for each way of a connection.
    fn connections(&self) -> u64 {
        let splices = self.site.bulk || self.site.layer == Layer::Packets;
        connections_max(self.descriptors) / if splices { 4 } else { 1 }
    }

    /// How often a block is written.
    fn times(&self, directive: &str) -> Result<usize> {
        let (_, word) = directive
            .split_once(' ')
            .context("a block without a word")?;
        let is = |condition: bool| Ok(usize::from(condition));
        match word {
            "route" => Ok(self.site.routes),
            "plain" => is(self.site.routes == 0 && !self.site.gateway),
            "routed" => is(self.site.routes > 0),
            "tls" => is(self.site.tls),
            "clear" => is(!self.site.tls),
            // Neither TLS nor many routes: they have no block in common.
            "bare" => is(!self.site.tls && self.site.routes == 0),
            "gateway" => is(self.site.gateway),
            "bulk" => is(self.site.bulk),
            "slowed" => is(self.is_slowed),
            _ => bail!("no block is called `{word}`"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(template: &str, tls: bool, routes: usize) -> Result<String> {
        Values {
            folder: Path::new("/run/x"),
            site: Site {
                tls,
                routes,
                ..Site::default()
            },
            is_slowed: false,
            descriptors: 20_000,
        }
        .fill(template)
    }

    #[test]
    fn blocks_are_kept_left_out_and_repeated() {
        let template = "a @LISTEN@\n  #if tls\nb\n  #end\n#each route\nr@N@\n#end\nc @FOLDER@\n";
        assert_eq!(
            fill(template, false, 2).unwrap(),
            "a 127.0.0.1:8000\nr0\nr1\nc /run/x\n"
        );
        assert_eq!(
            fill(template, true, 0).unwrap(),
            "a 127.0.0.1:8000\nb\nc /run/x\n"
        );
    }

    #[test]
    fn a_template_with_a_mistake_is_refused() {
        for wrong in [
            "#if moon\n#end",
            "#if tls\n",
            "#end",
            "#if tls\n#if clear\n#end\n#end",
        ] {
            assert!(fill(wrong, false, 0).is_err(), "{wrong}");
        }
    }
}
