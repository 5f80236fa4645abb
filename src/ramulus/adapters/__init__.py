"""For those who train elsewhere: ramulus's trees and credit inside other libraries' trainers, each in a module that is imported where it is used."""
