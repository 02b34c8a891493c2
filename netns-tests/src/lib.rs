//! What tests the whole: a simulator (virtual internet, virtual time) and a lab (network namespaces, real packets).

pub mod demo;
pub mod fuzz;
pub mod gateway;
pub mod lab;
pub mod mesh;
pub mod office;
pub mod programs;
pub mod sim;
pub mod traffic;
pub mod tunnel;
